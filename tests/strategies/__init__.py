"""Hypothesis strategies: generators that only ever build valid inputs."""
