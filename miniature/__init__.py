"""The paper on two CPU cores: a synthetic world, its tasks, a nano model's own stages, a judge of images."""
