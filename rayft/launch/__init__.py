"""From a recipe to its processes: a Ray to work on, workers on it, and what becomes of them."""
