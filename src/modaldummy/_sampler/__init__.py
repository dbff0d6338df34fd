"""Batches that contain the same modalities on every rank."""

from modaldummy._sampler.sampler import ModalityBatchSampler

__all__ = ["ModalityBatchSampler"]
