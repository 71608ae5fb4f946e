"use strict";

// A classic script, not a module: it runs before the first paint, so the page does not flash in the other theme.
{
  const apply = () => {
    let theme = null;
    try {
      theme = localStorage.getItem("duck.theme");
    } catch { /* no storage: the theme of the system */ }
    document.documentElement.dataset.theme = theme === "light" || theme === "dark" ? theme : "system";
  };
  apply();
  addEventListener("storage", apply); // another tab changed it
}
