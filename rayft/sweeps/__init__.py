"""The parts of a sweep: which trials, in what order, on which processes, and what is kept of them."""
