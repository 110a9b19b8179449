"""mini and mini-declip: training and shipping."""
