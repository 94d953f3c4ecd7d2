"""What is measured on a network before and after a defence: rates with their intervals, and a trigger's
stealth. The numbers go into a record (`study`)."""
