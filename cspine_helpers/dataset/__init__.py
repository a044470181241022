"""Packed sequences as torch samples: varied once a sequence, batched in an order that a seed decides."""

from cspine_helpers.dataset.sequence import SequenceDataset, batch_contents, make_loader
