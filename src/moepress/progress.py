"""Progress for a pipe or a file: whole lines every some seconds, where a terminal would get a bar that is drawn over itself.

A stage's output always goes through a pipe, into its log and into the terminal at once, together with that of other jobs.
"""

from datetime import timedelta

from tqdm.std import tqdm

SECONDS = 10.0
"""Between two lines of one bar. A bar that ends sooner says nothing."""


def use_lines() -> None:
    """Let every tqdm bar of this process write lines where its file is no terminal, those of libraries too."""
    bar = {name: getattr(tqdm, name) for name in ("display", "close", "clear", "moveto")}

    def is_bar(self) -> bool:
        """Whether it is tqdm's own business: in a terminal, or disabled, when it has no file."""
        return not hasattr(self, "fp") or getattr(self.fp, "isatty", lambda: False)()

    def display(self, msg=None, pos=None):
        if is_bar(self):
            return bar["display"](self, msg, pos)
        now = self._time()
        began = getattr(self, "start_t", now)  # not set yet where the bar is only being made
        if now - getattr(self, "last_line_t", began) >= SECONDS:
            self.last_line_t = now
            self.fp.write(line(self.format_dict) + "\n")
            self.fp.flush()

    def close(self):
        if is_bar(self) or self.disable:
            return bar["close"](self)
        self.disable = True
        self._decr_instances(self)
        if hasattr(self, "last_line_t"):  # it took long enough for the end to be news
            self.fp.write(line(self.format_dict) + "\n")
            self.fp.flush()

    def clear(self, nolock=False):
        if is_bar(self):
            bar["clear"](self, nolock)

    def moveto(self, n):
        if is_bar(self):
            bar["moveto"](self, n)

    for replaced in (display, close, clear, moveto):
        setattr(tqdm, replaced.__name__, replaced)


def line(state: dict) -> str:
    """`quantization qesc-2.5: 3 of 32 layers, 0:12:40 so far, about 2:02:31 left`. state: a bar's format_dict."""
    done, total, unit = state["n"], state["total"], state["unit"]
    if state["unit_scale"]:
        scaled = [tqdm.format_sizeof(number) for number in (done, total or 0)]
    else:
        scaled = [f"{number:g}" if isinstance(number, float) else str(number) for number in (done, total or 0)]
    units = f"{unit}s" if len(unit) > 1 else unit
    text = f"{scaled[0]} of {scaled[1]} {units}" if total else f"{scaled[0]} {units}"
    elapsed = state["elapsed"]
    text += f", {clock(elapsed)} so far"
    rate = state["rate"] or ((done - state["initial"]) / elapsed if elapsed else None)
    if total and rate and done < total:
        text += f", about {clock((total - done) / rate)} left"
    postfix = f" ({state['postfix']})" if state["postfix"] else ""
    prefix = f"{state['prefix'].removesuffix(': ')}: " if state["prefix"] else ""
    return f"{prefix}{text}{postfix}"


def clock(seconds: float) -> str:
    """`0:12:40`."""
    return str(timedelta(seconds=round(seconds)))
