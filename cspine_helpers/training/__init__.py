"""A training run: settings, losses, stages, the loop, and what is kept to resume it."""

from cspine_helpers.training.config import preset, settings_of
from cspine_helpers.training.losses import Loss, focal_loss
from cspine_helpers.training.run import beside, train
