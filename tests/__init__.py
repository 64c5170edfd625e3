"""A package, so that ``tests`` means this folder: kronfluence's wheel installs one of that name."""
