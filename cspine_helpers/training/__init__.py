"""A training run: its settings, losses, task and trainer, the state from which it resumes, and its folds."""

from cspine_helpers.training.folds import train_folds
from cspine_helpers.training.losses import Loss, focal_loss
from cspine_helpers.training.run import beside, set_aside, train
from cspine_helpers.training.settings import Settings, preset, settings_of
