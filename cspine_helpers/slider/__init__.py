"""The threshold slider: what a person moves, and what it shows."""

from cspine_helpers.slider.widget import ThresholdExplorer
