"""The scenes dataset: drawn pictures of simple shapes, with captions that are true of them. Nothing here is a photograph."""
