"""The main job on real data: a recipe, a model and a config that a user copies for data of their own."""
