"""The card of a run, written from what its folder holds."""

from cspine_helpers.model_card.card import write_card
