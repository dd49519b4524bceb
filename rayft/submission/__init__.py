"""The ways of a recipe to somebody else's machines: Ray's job server and Kubernetes."""
