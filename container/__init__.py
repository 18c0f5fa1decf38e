"""Containers: the engine, the standard launch with its mounts and entrypoints. Imports nothing of the project."""
