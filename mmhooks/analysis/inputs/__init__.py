"""What measures are given: checks, sparse rows, passes over a store."""
