"""Batches with the same modalities at the same step on every rank."""

from modaldummy._sampler.sampler import ModalityBatchSampler

__all__ = ["ModalityBatchSampler"]
