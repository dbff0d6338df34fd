"""Breaks of the core that no test can notice, and why; `tests/mutants.py` holds them to that."""

_STRICT = "both sides have the same length by construction; `strict` says so to the reader"

_FASTER = "the same term, a little later"

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
    "_term.py _clip: 2 -> 3": "a little more room below the largest number than is needed",
    "_term.py _clip: real.numel() > 1 -> real.numel() >= 1": "of one number the mean is the peak",
    "_term.py _clip: limit >= torch.finfo(limit.dtype).tiny -> "
    "limit > torch.finfo(limit.dtype).tiny": "differs at one number, and both results are bounded",
    "_batch.py Reader._present: zip(masks, read, strict=True) -> zip(masks, read)": _STRICT,
    "_batch.py Reader._present: True -> False": _STRICT,
    "_batch.py Reader._read_array: zip(self.modalities, columns, strict=True) -> "
    "zip(self.modalities, columns)": _STRICT,
    "_batch.py Reader._read_array: True -> False (2)": _STRICT,
}
