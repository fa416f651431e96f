// Opens pages of build/site at three sizes, in light and dark, and prints what axe finds. Exit code 1 where that is serious or
// critical, where a page is wider than its window, or where one asks for a file from elsewhere.
// node check.mjs SITE PICTURES

import { createServer } from "node:http";
import { mkdir, readFile } from "node:fs/promises";
import { extname, join } from "node:path";
import axe from "axe-core";
import { chromium } from "playwright-core";

const [site, pictures] = process.argv.slice(2);
const PAGES = {
  home: "",
  which: "docs/which/",
  "every-step": "docs/every-step/",
  failures: "docs/failures/",
  drawn: "docs/algorithms/",
  timeline: "docs/timeline/",
  tuning: "docs/tuning/",
  "coming-from": "docs/coming-from/",
  notebook: "examples/one_round/",
  security: "SECURITY/",
  algorithms: "docs/reference/algorithms/",
  results: "results/small/report/",
};
const SIZES = { phone: [390, 844], tablet: [820, 1180], desktop: [1400, 1000] };
// The pictures that are kept; the other sizes are looked at by axe alone.
const KEPT = new Set(["home-desktop-light", "home-phone-light", "drawn-desktop-light", "timeline-desktop-dark", "algorithms-desktop-light"]);
const TYPES = { ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".png": "image/png", ".json": "application/json" };

const server = createServer(async (request, answer) => {
  const path = decodeURIComponent(new URL(request.url, "http://site").pathname);
  const file = join(site, path.endsWith("/") ? path + "index.html" : path);
  try {
    const body = await readFile(file);
    answer.writeHead(200, { "content-type": TYPES[extname(file)] ?? "application/octet-stream" }).end(body);
  } catch {
    answer.writeHead(404).end();
  }
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const root = `http://127.0.0.1:${server.address().port}/`;

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
await mkdir(pictures, { recursive: true });
let bad = 0;
const complain = (line) => {
  bad += 1;
  console.log(line);
};
for (const [size, [width, height]] of Object.entries(SIZES)) {
  for (const colorScheme of size === "desktop" ? ["light", "dark"] : ["light"]) {
    const context = await browser.newContext({ viewport: { width, height }, colorScheme });
    for (const [name, path] of Object.entries(PAGES)) {
      const label = `${name}-${size}-${colorScheme}`;
      const page = await context.newPage();
      page.on("request", (r) => r.url().startsWith(root) || r.url().startsWith("data:") || complain(`${label}: asks for ${r.url()}`));
      page.on("response", (r) => r.status() >= 400 && complain(`${label}: ${r.status()} ${r.url()}`));
      await page.goto(root + path, { waitUntil: "networkidle" });
      // The theme wraps tables once the page is there; on a busy machine some time later.
      await page.waitForFunction(() => [...document.querySelectorAll("article table:not([class])")].every((t) => t.closest(".md-typeset__scrollwrap")));
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      if (wide > 0) complain(`${label}: ${wide} pixels wider than its window`);
      await page.evaluate(axe.source);
      const { violations } = await page.evaluate(() => window.axe.run());
      for (const { id, impact, help, nodes } of violations) {
        const line = `${label}: ${impact}: ${id}: ${help} (${nodes.length}), first ${nodes[0].target}`;
        if (["serious", "critical"].includes(impact)) complain(line);
        else console.log(line);
      }
      if (name === "every-step") await page.locator(".formula").first().scrollIntoViewIfNeeded();
      if (name === "drawn") await page.goto(`${root}${path}#localsgd`);
      if (KEPT.has(label)) await page.screenshot({ path: join(pictures, `${label}.png`) });
      await page.close();
    }
    await context.close();
  }
}
await browser.close();
server.close();
console.log(bad ? `${bad} findings that must go` : "no serious findings");
process.exit(bad ? 1 : 0);
