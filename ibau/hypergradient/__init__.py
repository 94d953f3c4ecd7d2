"""The mathematics of the minimax: linear solvers, the implicit hypergradient, layers with cheap second
derivatives, a toy problem with a closed form. Beside the flow: it imports nothing of ours, and the defences
`unlearning` and `cleaning` are built on it."""
