"""The recipe of the tiny models: their captions, their images, and the trainings."""
