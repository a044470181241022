"""Cervical-spine fracture detection on CT: one small package behind the numbered notebooks.

Research software, not a medical device.
"""

__version__ = "0.1.0"
