"""Radiographs of any bone: sources into one image table, groups, a network with a mask, and its evidence."""
