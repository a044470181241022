"""The commands, with their options and their work; a room loads what it needs when it is asked."""
