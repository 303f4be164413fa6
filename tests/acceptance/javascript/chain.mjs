/** fal's official proxy under Express, as its README sets it up, with this server's host allowed. */

import { createHandler, route } from "@fal-ai/server-proxy/express";
import express from "express";

import { perform } from "./verbs.mjs";

export async function openChain(base) {
  const app = express();
  app.use(express.json());
  app.all(
    route,
    createHandler({
      allowedUrlPatterns: [`${new URL(base).host}/**`],
      allowedEndpoints: ["run/fal-ai/**", "queue/fal-ai/**"],
      allowUnauthorizedRequests: false,
      isAuthenticated: async () => true,
      resolveFalAuth: async () => "Key of-the-proxy",
    }),
  );
  const listener = await new Promise((resolve) => {
    const server = app.listen(0, "127.0.0.1", () => resolve(server));
  });
  const via = `http://127.0.0.1:${listener.address().port}${route}`;
  return {
    perform: (text) => perform(JSON.stringify({ ...JSON.parse(text), via })),
    close: async () => {
      listener.close();
      listener.closeAllConnections();
    },
  };
}
