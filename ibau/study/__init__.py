"""The experiments: settings in, records out. One cell is dataset -> attack -> network -> defence ->
measurement -> record; `report` makes pages of the records."""
