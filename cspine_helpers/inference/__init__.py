"""Probabilities from a trained run: a cohort's table, or one study; and from several runs."""

from cspine_helpers.inference.ensemble import predict_ensemble, predict_folds
from cspine_helpers.inference.prediction import predict, predict_cohort
from cspine_helpers.inference.study import predict_study
