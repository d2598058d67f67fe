"""The main job: a model and its pictures, a question, the train rows, an answer."""
