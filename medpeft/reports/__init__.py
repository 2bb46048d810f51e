"""The numbers: parameters that train, and costs of a step."""
