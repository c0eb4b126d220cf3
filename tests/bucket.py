"""A bucket in memory whose requests can be counted, failed, repeated and delayed."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from obstore.exceptions import GenericError
from obstore.store import MemoryStore

URL = "memory://bucket/store"
VERBS = ("put", "get", "head", "list", "list_with_delimiter", "delete")


class Bucket:
    """Stands in for the client of `pipeline.objects`.

    Attributes:
        requests: how often each verb was used.
        strike: called with the number of the request, from 0, its verb and path; it may name a fault: "refused" fails
            the request, "unanswered" does it and loses the answer, "repeated" does so and the client asks again; a
            number delays it by so many seconds.
    """

    def __init__(self, strike: Callable[[int, str, str], str | float | None] = lambda number, verb, path: None) -> None:
        self.store, self.strike, self.requests = MemoryStore(), strike, Counter()

    def __getattr__(self, verb: str) -> Any:
        request = getattr(self.store, verb)
        if verb not in VERBS:
            return request

        def asked(path: Any, *arguments: Any, **options: Any) -> Any:
            number = self.requests.total()
            self.requests[verb] += 1
            fault = self.strike(number, verb, path)
            if isinstance(fault, float):
                time.sleep(fault)
            if fault == "refused":
                raise GenericError("503 Slow Down")
            answer = request(path, *arguments, **options)
            if fault == "unanswered":
                raise GenericError("operation timed out")
            return request(path, *arguments, **options) if fault == "repeated" else answer

        return asked
