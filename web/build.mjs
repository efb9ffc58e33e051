// Bundles the page into src/ossia/server/web, which is what the package ships: `npm ci && npm run build`.
import { build } from "esbuild";
import { copyFile, mkdir, readFile, readdir, rm, writeFile } from "node:fs/promises";

const out = new URL("../src/ossia/server/web/", import.meta.url);
await rm(out, { recursive: true, force: true });
await mkdir(out, { recursive: true });

await build({
  entryPoints: { app: "src/main.tsx", style: "src/style.css" },
  outdir: out.pathname,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "none",
  loader: { ".woff2": "file", ".woff": "empty", ".ttf": "empty" },
  assetNames: "[name]",
  publicPath: "/web",
});
await copyFile("src/index.html", new URL("index.html", out));
await copyFile("src/icon.svg", new URL("icon.svg", out));

// The licences of what is in the bundle.
const { dependencies } = JSON.parse(await readFile("package.json", "utf8"));
const names = [...Object.keys(dependencies), "@preact/signals-core", "linkify-it", "mdurl", "entities", "uc.micro", "punycode.js"];
let licences = "The page contains these libraries.\n";
for (const name of names) {
  const folder = `node_modules/${name}`;
  const { version, license } = JSON.parse(await readFile(`${folder}/package.json`, "utf8"));
  const file = (await readdir(folder)).find((one) => /^licen[cs]e/i.test(one));
  licences += `\n${"=".repeat(80)}\n${name} ${version} (${license})\n\n${file ? await readFile(`${folder}/${file}`, "utf8") : ""}`;
}
await writeFile(new URL("LICENSES.txt", out), licences);
