"""Breaks of the core that no test can notice, and why; `tests/mutants.py` holds them to that."""

_STRICT = "both sides have the same length by construction; `strict` says so to the reader"

_FASTER = "the same term, a little later"

_NO_LOOKUP = "not to look parameters up where everything was taught, and nothing is asked of them"

_KEPT = "how many sets of names are kept decides how often they are made, and nothing else"

_NO_OTHER_DEVICE = "only a tensor on another device has to be forced to the host"

_SEES_NOTHING = "a removed handle sees and holds nothing; not to ask it at each step"

SURVIVORS = {
    "_term.py connect: by_layout(params) if groups is None else groups -> "
    "by_layout(params)": _FASTER,
    "_term.py connect: _Connect.apply if transformed() else super(torch.autograd.Function, "
    "_Connect).apply -> _Connect.apply": _FASTER,
    "_term.py _Connect.setup_context: {key: params[own[0]] for key, own in ctx.groups.items()} if "
    "plain else {} -> {key: params[own[0]] for key, own in ctx.groups.items()}": (
        "backward does not ask them either; not to keep tensors of a transform that has ended"
    ),
    "_term.py _Connect.backward: transformed() or 'Batched' in str(torch._C._dispatch_keys("
    "upstream)) -> 'Batched' in str(torch._C._dispatch_keys(upstream))": (
        "forward has kept nothing then, except where backward alone is compiled"
    ),
    "_term.py dummy_term: {} if scale is None else by_layout(params) -> by_layout(params)": _FASTER,
    "_term.py _Connect.backward:  for key, param in samples.items() if param.is_leaf and "
    "param.grad is None ->  for key, param in samples.items()": (
        "where gradients are there already a buffer costs more than an expanded number does"
    ),
    "_modalities.py ModalityMap.inactive_parameters:  for key in self.paths if key not in present "
    "->  for key in self.paths": (
        "what active keys own is taught, and left out for that; not to look it up once more"
    ),
    "_hold/holder.py Holder._give_back: self._taken = [] -> pass": (
        "the next step replaces it before it is read; not to keep gradients until then"
    ),
    "_hold/holder.py Holder._after_step: self.handles = [handle for handle in self.handles if not "
    "handle._removed] -> pass": _SEES_NOTHING,
    "_hold/holder.py Holder._after_step:  for handle in self.handles if not handle._removed -> "
    " for "
    "handle in self.handles": _SEES_NOTHING,
    "_term.py _clip: 2 -> 3": "a little more room below the largest number than is needed",
    "_term.py _clip: real.numel() > 1 -> real.numel() >= 1": "of one number the mean is the peak",
    "_term.py _clip: limit >= torch.finfo(limit.dtype).tiny -> "
    "limit > torch.finfo(limit.dtype).tiny": "differs at one number, and both results are bounded",
    "_hold/window.py Window.watch: self._record if self._record.seen else None -> self._record": (
        "of an empty record there is nothing to forget; not to look at all gradients at each step"
    ),
    "_hold/window.py Window.outcome: zip(self._keys, marks, strict=True) -> "
    "zip(self._keys, marks)": _STRICT,
    "_hold/window.py Window.outcome: True -> False": _STRICT,
    "_hold/window.py _maximum: torch.tensor(numbers, device=tensor_device(group, device)) -> "
    "torch.tensor(numbers)": "the tests have no backend that takes nothing on the CPU",
    "_hold/holder.py Holder._take: self.identities().difference(*(known for known, _ in "
    "outcomes)) if "
    "some else () -> self.identities().difference(*(known for known, _ in outcomes))": (
        "nothing is held either way; not to list all parameters where everything was taught"
    ),
    "_hold/holder.py Holder._take: zip(self.handles, outcomes, strict=True) -> "
    "zip(self.handles, outcomes)": _STRICT,
    "_hold/holder.py Holder._take: True -> False": _STRICT,
    "_hold/hold.py HoldHandle.__init__: False -> True "
    "(2)": "at exit nothing is left to unwatch for",
    "_hold/hold.py HoldHandle._outcome: self._map.owned(taught) if inactive or "
    "len(self._holder.handles) > 1 else {} -> self._map.owned(taught)": _NO_LOOKUP,
    "_hold/hold.py HoldHandle._outcome: len(self._holder.handles) > 1 -> "
    "len(self._holder.handles) >= 1": _NO_LOOKUP,
    "_batch.py Reader._present: zip(masks, read, strict=True) -> zip(masks, read)": _STRICT,
    "_batch.py Reader._present: True -> False": _STRICT,
    "_batch.py Reader._read_array: zip(self.modalities, columns, strict=True) -> "
    "zip(self.modalities, columns)": _STRICT,
    "_batch.py Reader._read_array: True -> False (2)": _STRICT,
    "_preflight/drift.py _samples:  for p in eligible if p.numel() <= _SMALL and p is not "
    "least[p.ndim] -> "
    " for p in eligible": "more parameters say the same, later",
    "_preflight/drift.py _drifts:  for name in group if name != 'params' ->  for name in group": (
        "the copies are replaced in the next lines; not to copy a whole model"
    ),
    "_monitor/gradients.py Stock.__init__: functools.lru_cache(maxsize=32) -> "
    "functools.lru_cache()": _KEPT,
    "_monitor/gradients.py Stock.__init__: 32 -> 33": _KEPT,
    "_monitor/gradients.py Stock.measure: torch.cat([lengths, "
    "factor.reshape(1)]).numpy(force=True) -> "
    "torch.cat([lengths, factor.reshape(1)]).numpy()": _NO_OTHER_DEVICE,
    "_monitor/gradients.py Stock.measure: True -> False": _NO_OTHER_DEVICE,
    "_monitor/gradients.py _names: zip(places, bare, strict=True) -> zip(places, bare)": _STRICT,
    "_monitor/gradients.py _names: True -> False": _STRICT,
    "_monitor/gradients.py dense: gradient if type(gradient) is Tensor else "
    "local_shard(gradient) -> "
    "local_shard(gradient)": "a plain tensor is its own shard; to ask it takes longer",
    "_monitor/norms.py gradient_norms: zip(names, norm.tolist(), strict=True) -> "
    "zip(names, norm.tolist())": _STRICT,
    "_monitor/norms.py gradient_norms: True -> False": _STRICT,
    "_monitor/norms.py gradient_norms: zip(names, there, stock.parameters, strict=True) -> "
    "zip(names, there, stock.parameters)": _STRICT,
    "_monitor/norms.py gradient_norms: True -> False (2)": _STRICT,
    "_monitor/norms.py gradient_norms: dist.is_available() and dist.is_initialized() and "
    "(dist.get_world_size() > 1) -> dist.is_initialized() and dist.get_world_size() > 1": (
        "only a torch that was built without torch.distributed tells"
    ),
    "_monitor/missing.py _kinds: 0 -> "
    "1": "elements are looked at where the norm would have been enough",
}
