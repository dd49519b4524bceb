"""What a recipe's sections hold, what fits, and how what doesn't is told."""
