// The theme, set before anything is painted: like the system, light or dark.
"use strict";
(() => {
  const themes = ["auto", "light", "dark"];
  const says = { auto: "Theme: like the system", light: "Theme: light", dark: "Theme: dark" };
  const root = document.documentElement;
  let theme = "auto";
  // A browser may forbid storage; the theme then lasts as long as the page.
  try { theme = themes.includes(localStorage.moesaicTheme) ? localStorage.moesaicTheme : "auto"; } catch { theme = "auto"; }

  function apply() {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = `Theme: ${theme}`;
      button.setAttribute("aria-label", says[theme]);
    }
    document.dispatchEvent(new Event("theme"));
  }

  apply();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      theme = themes[(themes.indexOf(theme) + 1) % themes.length];
      try { localStorage.moesaicTheme = theme; } catch { /* not kept */ }
      apply();
    });
  });
})();
