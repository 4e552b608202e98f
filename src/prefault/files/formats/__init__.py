"""Formats in which names stand for bytes of files: tensors of models, modules and libraries of Python environments."""
