// What scrolls sideways is reached by the keyboard too.
function reachable() {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .formula, pre > code")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
addEventListener("load", reachable);
addEventListener("resize", reachable);
// The theme wraps tables when it comes to it.
new MutationObserver(reachable).observe(document.documentElement, { childList: true, subtree: true });
