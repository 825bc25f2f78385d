// The journey of one visitor, by Jitsu's own client. Arguments: host, write key, "s2s" or "".
const { jitsuAnalytics } = require("@jitsu/js");

const [host, writeKey, s2s] = process.argv.slice(2);

async function main() {
  const client = jitsuAnalytics({ host, writeKey, s2s: s2s === "s2s", errorPolicy: "rethrow" });
  await client.page({ name: "p0" });
  await client.track("Product Viewed", { sku: "A1" });
  await client.identify("u-1", { email: "u1@example.com", firstName: "Ünal" });
  await client.track("Order Completed", { total: 12.5 });
  await client.group("acme", { plan: "x" });
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
