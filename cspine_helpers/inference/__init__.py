"""Probabilities from a trained run: a cohort's table, or one study."""

from cspine_helpers.inference.prediction import predict, predict_cohort
from cspine_helpers.inference.study import predict_study
