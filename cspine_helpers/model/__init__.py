"""The network: slice encoder, mask encoder, bidirectional LSTM, pooling; chosen by name in `ModelConfig`."""

from cspine_helpers.model.classifier import FractureClassifier
