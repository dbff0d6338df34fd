"""Breaks of the code that no test can notice, and why; a run of `tools/mutants.py` checks them."""

_STRICT = "both sides have the same length by construction; `strict` says so to the reader"

_FASTER = "the same term, a little later"

_CACHE_SIZE = "the size of the cache decides how often names are made, and nothing else"

_NO_OTHER_DEVICE = "only a tensor on another device has to be forced to the host"

_REMOVED_HOLD = "a hold that has ended holds nothing; it is dropped so that no step asks it"

SURVIVORS = {
    "_core/term.py connect: by_spec(tensors) if groups is None else groups -> by_spec(tensors)": _FASTER,
    "_core/term.py _Connect.setup_context: {spec: tensors[i[0]] for spec, i in ctx.groups.items()} if has_grads else {} -> {spec: tensors[i[0]] for spec, i in ctx.groups.items()}": "backward does not read them either; no tensor of a finished transform is kept",
    "_core/term.py dummy_term: {} if scale is None else by_spec(tensors) -> by_spec(tensors)": _FASTER,
    "_core/term.py _Connect.backward:  for spec, p in samples.items() if p.is_leaf and p.grad is None ->  for spec, p in samples.items()": "where gradients are there already a buffer costs more than an expanded number does",
    "_hold/holder.py Holder._restore_gradients: self._hidden = [] -> pass": "the next step replaces it before it is read; not to keep gradients until then",
    "_hold/holder.py Holder._after_step: self.holds = [hold for hold in self.holds if not hold.ended] -> pass": _REMOVED_HOLD,
    "_hold/holder.py Holder._after_step:  for hold in self.holds if not hold.ended ->  for hold in self.holds": _REMOVED_HOLD,
    "_core/term.py _cap: 2 -> 3": "a little more room below the largest number than is needed",
    "_core/term.py _cap: loss.numel() > 1 -> loss.numel() >= 1": "of one number the mean is the peak",
    "_core/term.py _cap: limit >= torch.finfo(limit.dtype).tiny -> limit > torch.finfo(limit.dtype).tiny": "differs at one number, and both results are bounded",
    "_hold/trained_keys.py TrainedKeys.agree: zip(self._keys, _maximum_of_ranks(states, group, device), strict=True) -> zip(self._keys, _maximum_of_ranks(states, group, device))": _STRICT,
    "_hold/trained_keys.py TrainedKeys.agree: True -> False": _STRICT,
    "_hold/trained_keys.py _maximum_of_ranks: torch.tensor(numbers, device=tensor_device(group, device)) -> torch.tensor(numbers)": "the tests have no backend that takes nothing on the CPU",
    "_core/batch.py BatchReader._present: zip(masks, on_host, strict=True) -> zip(masks, on_host)": _STRICT,
    "_core/batch.py BatchReader._present: True -> False": _STRICT,
    "_core/batch.py BatchReader._read_mask: zip(self.modalities, columns, strict=True) -> zip(self.modalities, columns)": _STRICT,
    "_core/batch.py BatchReader._read_mask: True -> False": _STRICT,
    "_preflight/drift.py _sample_parameters:  for p in eligible if p.numel() <= _MAX_SAMPLE_ELEMENTS and p is not smallest[p.ndim] ->  for p in eligible": "more parameters say the same, later",
    "_preflight/drift.py _measure_drifts:  for name in group if name != 'params' ->  for name in group": "the copies are replaced in the next lines; not to copy a whole model",
    "_monitor/gradients.py ParameterTable.__init__: functools.lru_cache(maxsize=32) -> functools.lru_cache()": _CACHE_SIZE,
    "_monitor/gradients.py ParameterTable.__init__: 32 -> 33": _CACHE_SIZE,
    "_monitor/gradients.py ParameterTable.measure: torch.cat([local_norms, factor.reshape(1)]).numpy(force=True) -> torch.cat([local_norms, factor.reshape(1)]).numpy()": _NO_OTHER_DEVICE,
    "_monitor/gradients.py ParameterTable.measure: True -> False": _NO_OTHER_DEVICE,
    "_monitor/gradients.py _log_keys: zip(owner_of_row, names, strict=True) -> zip(owner_of_row, names)": _STRICT,
    "_monitor/gradients.py _log_keys: True -> False": _STRICT,
    "_monitor/gradients.py local_elements: gradient if type(gradient) is Tensor else local_shard(gradient) -> local_shard(gradient)": "a plain tensor is its own shard; to ask it takes longer",
    "_monitor/norms.py _parameter_norms: zip(log_keys, measured.norms.tolist(), strict=True) -> zip(log_keys, measured.norms.tolist())": _STRICT,
    "_monitor/norms.py _parameter_norms: True -> False": _STRICT,
    "_monitor/norms.py gradient_norms: dist.is_available() and dist.is_initialized() and (dist.get_world_size() > 1) -> dist.is_initialized() and dist.get_world_size() > 1": "only a torch that was built without torch.distributed tells",
    "_monitor/missing.py _find_problems: 0 -> 1": "elements are looked at where the norm would have been enough",
}
