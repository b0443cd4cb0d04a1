"""How long forward passes take here, measured while they run: so much per pass and so much per active token. Pure."""

from __future__ import annotations

MEASURE_S = 0.05  #: engine time that a measurement covers at least
KEEP = 0.8  #: weight of what was known when a measurement comes
PASS_S, TOKEN_S = 5e-3, 1 / 20_000  #: what is assumed of the share that measurements cannot tell apart
_RIDGE = 1e-3  # of it, relative to what is measured


class PassSpeed:
    """Fits seconds = pass_s * passes + token_s * rows to running totals, by least squares over recent measurements.

    Warm requests have few rows and many passes, cold ones many rows and few passes; a figure of tokens per second alone
    would be off by a factor for one of them. Where recent measurements are all of one mix, the fit leans to
    ``PASS_S : TOKEN_S``, scaled to what was measured.
    """

    def __init__(self) -> None:
        self._totals = (0, 0, 0.0)
        self._pp = self._pr = self._rr = self._ps = self._rs = 0.0
        self.pass_s = 0.0  #: 0: not measured yet
        self.token_s = 0.0

    def observe(self, passes: int, rows: int, seconds: float) -> None:
        """Totals since the start: forward passes, their active tokens, seconds of engine time in them."""
        before = self._totals
        p, r, s = passes - before[0], rows - before[1], seconds - before[2]
        if s < MEASURE_S or not p or not r:
            return
        self._totals = (passes, rows, seconds)
        self._pp = KEEP * self._pp + p * p
        self._pr = KEEP * self._pr + p * r
        self._rr = KEEP * self._rr + r * r
        self._ps, self._rs = KEEP * self._ps + p * s, KEEP * self._rs + r * s
        self._fit()

    def _fit(self) -> None:
        # The assumed mix, scaled so that it explains what was measured.
        scale = (PASS_S * self._ps + TOKEN_S * self._rs) / (
            PASS_S**2 * self._pp + 2 * PASS_S * TOKEN_S * self._pr + TOKEN_S**2 * self._rr
        )
        pp, rr = self._pp * (1 + _RIDGE), self._rr * (1 + _RIDGE)
        ps = self._ps + _RIDGE * self._pp * scale * PASS_S
        rs = self._rs + _RIDGE * self._rr * scale * TOKEN_S
        det = pp * rr - self._pr**2
        pass_s, token_s = (ps * rr - rs * self._pr) / det, (rs * pp - ps * self._pr) / det
        if pass_s < 0:
            pass_s, token_s = 0.0, rs / rr
        elif token_s < 0:
            pass_s, token_s = ps / pp, 0.0
        self.pass_s, self.token_s = pass_s, token_s
