"""Records -> tables, claims, figures and the README's results: the last step of the flow, which trains
nothing."""
