"""Radiographs as they are published, read strictly: a room for each layout, and what a source is."""
