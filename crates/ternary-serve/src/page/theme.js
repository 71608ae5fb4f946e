"use strict";

// Not a module, so that it runs before the page is painted: a chosen theme does not flash up in the other one.
{
  const use = () => {
    let theme = null;
    try {
      theme = localStorage.getItem("duck.theme");
    } catch { /* no storage: as the system has it */ }
    document.documentElement.dataset.theme = theme === "light" || theme === "dark" ? theme : "system";
  };
  use();
  addEventListener("storage", use); // another tab has changed it
}
