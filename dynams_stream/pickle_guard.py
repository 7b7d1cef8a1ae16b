"""Decoding that never unpickles by itself: webdataset's decoders without those that would run a sample's code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from webdataset import autodecode, filters

from dynams_stream.errors import DynamsError, SampleError

PICKLE_EXTENSIONS: Final = frozenset({"pkl", "pickle", "pyd", "pth"})
"""Last components of extensions that webdataset would unpickle, by `pickle.loads` or `torch.load`."""

Handler = Callable[[str, bytes], Any]


def refuse_pickle(extension: str, data: bytes) -> None:
    """A handler that stops at pickles and leaves everything else to the handlers after it.

    Raises:
        SampleError: when `data` is a pickle by its extension.
    """
    if re.sub(r".*[.]", "", extension).lower() in PICKLE_EXTENSIONS:
        raise SampleError(
            f"the member {extension!r} would be unpickled, which runs whatever code it holds; leave it out with "
            f"decode(..., only=[...]), or say decode(..., allow_pickle=True) if you trust the dataset"
        )


class GuardedDecoder(autodecode.Decoder):  # type: ignore[misc]
    """webdataset's decoder, with `refuse_pickle` ahead of its basic handlers, also after those that decompress."""

    def __init__(self, handlers: Iterable[Handler], **options: Any):
        super().__init__(list(handlers), **options)
        self.handlers: list[Handler] = _guarded(self.handlers)

    def decode(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Decode a whole sample.

        Raises:
            SampleError: when a member would be unpickled.
            webdataset.autodecode.DecodingError: when a handler fails.
        """
        try:
            return super().decode(sample)  # type: ignore[no-any-return]
        except autodecode.DecodingError as error:
            if isinstance(error.__cause__, DynamsError):
                refused = error.__cause__
                url, key, row = sample.get("__url__"), sample.get("__key__"), sample.get("__row__")
                raise SampleError(f"{url}: row {row}, key {key!r}: {refused}", shard=url, row=row, key=key) from None
            raise


def _guarded(handlers: Iterable[Handler]) -> list[Handler]:
    chain: list[Handler] = []
    for handler in handlers:
        chain += [refuse_pickle, handler] if handler is autodecode.basichandlers else [handler]
    return chain


def guarded_patterns(patterns: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The default patterns of webdataset's `xdecode`, with those that unpickle made to refuse."""
    return [
        (pattern, _refuser(pattern) if decoder is filters.decode_pickle else decoder) for pattern, decoder in patterns
    ]


class _refuser:  # noqa: N801 (a function that can be pickled)
    def __init__(self, pattern: str):
        self.pattern = pattern

    def __call__(self, stream: Any) -> None:
        refuse_pickle(self.pattern, b"")
