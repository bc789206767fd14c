"""Weights of other projects: key tables applied both ways, config conversion, readers and writers of their files."""
