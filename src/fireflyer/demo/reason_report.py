"""The reasoning demo's result: lines for a terminal, and the curve of learning as an SVG."""

from __future__ import annotations

from pathlib import Path

from fireflyer.demo.reason import COLD_START, GRPO, ReasonSummary, Score

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 300, 52, 60, 34, 40


def reason_lines(s: ReasonSummary, folder: Path) -> list[str]:
    """What was gained, stage by stage; one problem through all of them; what to try next."""
    lines = [
        f"{s.accuracy:.1%} of {s.held_out} harder problems it never saw are right, {s.gained:+.1%} by GRPO",
        "",
        "                    right   pass@1   pass@8   easy ones   tokens",
    ]
    for name, score in (("the demo's model", s.before), ("after cold start", s.cold_start), ("after GRPO", s.grpo)):
        lines.append(f"  {name:<17}{_row(score)}")
    lines += [
        "",
        f"  cold start {s.cold_start_s:.0f} s; GRPO {s.grpo_s:.0f} s, {s.steps} steps, {s.answers:,} answers,"
        f" {s.rollout_tokens_per_s:,.0f} tokens/s in rollouts",
        "",
    ]
    lines += [f"  {'ok   ' if e['right'] else 'wrong'} {e['prompt']}  {_shown(e['text'])}" for e in s.examples]
    return [
        *lines,
        "",
        f"The curve: {folder / 'curve.svg'}",
        "Try next",
        f"  fireflyer chat {folder / GRPO}     and ask it {s.examples[0]['prompt']}",
        f"  fireflyer report {folder / COLD_START} {folder / GRPO}",
    ]


def _row(score: Score) -> str:
    shares = f"{score.accuracy:>8.1%} {score.pass_at_1:>8.1%} {score.pass_at_8:>8.1%} {score.easy_accuracy:>11.1%}"
    return f"{shares} {score.length:>8.0f}"


def _shown(text: str) -> str:
    return text if len(text) <= 64 else f"{text[:61]}..."


def curve_svg(s: ReasonSummary) -> str:
    """Accuracy of the rollouts and on held-out problems over the steps, and the answers' length."""
    steps = s.curve[-1]["step"]
    longest = max(point["length"] for point in s.curve)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / steps

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    def path(key: str, scale: float) -> str:
        return " ".join(f"{x(p['step']):.1f},{y(p[key] / scale):.1f}" for p in s.curve if key in p)

    grid = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#8884"/>'
        f'<text x="{_LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        f'<text x="{_WIDTH - _RIGHT + 8}" y="{y(share) + 4:.1f}" fill="#1f6fb2">{share * longest:.0f}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    marks = [
        f'<circle cx="{x(p["step"]):.1f}" cy="{y(p["eval_accuracy"]):.1f}" r="4" fill="#b86a00"/>'
        for p in s.curve
        if "eval_accuracy" in p
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif"'
            ' font-size="12" fill="#777">',
            f'<text x="{_LEFT}" y="18">right answers: <tspan fill="#b86a00">line in rollouts, dots held out (greedy)'
            '</tspan>; <tspan fill="#1f6fb2">tokens of an answer</tspan></text>',
            *grid,
            f'<polyline points="{path("length", longest)}" fill="none" stroke="#1f6fb2" stroke-dasharray="4 3"/>',
            f'<polyline points="{path("accuracy", 1)}" fill="none" stroke="#b86a00" stroke-width="2"/>',
            *marks,
            f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">GRPO step, of'
            f" {steps:.0f}</text>",
            "</svg>",
            "",
        ]
    )
