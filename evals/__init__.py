"""What other people publish: benchmarks, distances, a study with people, and comparisons with their code."""
