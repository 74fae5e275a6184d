"""NaturalCG under Lightning."""
