// A real OpenID Connect provider (npm's oidc-provider, OpenID-certified) for the tests, over HTTPS on loopback.
//
// Its settings arrive as one line of JSON on standard input:
//   key, certificate   PEM of the TLS server
//   port               0: any
//   jwks               private keys that it signs with, the first one of an algorithm first
//   clients            client metadata
//   resources          {indicator: algorithm of its access tokens}
//   groups             {account or client id: the `groups` claim of its access tokens}
//   device_code_s      how long a device code lives
//   interval_s         how long to wait before asking for its tokens again
// It answers {"issuer": …} on one line when it listens, and ends when its standard input does.
//
// People log in on the provider's own development pages, which take any name and ask for no real password.

import https from 'node:https';
import { createInterface } from 'node:readline';
import Provider, { errors } from 'oidc-provider';

const lines = createInterface({ input: process.stdin });
const settings = JSON.parse((await lines[Symbol.asyncIterator]().next()).value);
process.stdin.on('end', () => process.exit(0)).resume();

const server = https.createServer({ key: settings.key, cert: settings.certificate });
await new Promise((listening) => server.listen(settings.port, '127.0.0.1', listening));
const issuer = `https://127.0.0.1:${server.address().port}`;

const provider = new Provider(issuer, {
  jwks: { keys: settings.jwks },
  clients: settings.clients,
  clientDefaults: { id_token_signed_response_alg: settings.jwks[0].alg },
  enabledJWA: {
    idTokenSigningAlgValues: ['ES256', 'RS256', 'PS256', 'EdDSA'],
    clientAuthSigningAlgValues: ['ES256', 'RS256', 'PS256', 'EdDSA', 'Ed25519'],
  },
  pkce: { required: () => true },
  scopes: ['openid', 'offline_access'],
  claims: { openid: ['sub'] },
  findAccount: (_ctx, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
  extraTokenClaims: (_ctx, token) => ({ groups: settings.groups[token.accountId ?? token.clientId] ?? [] }),
  ttl: { DeviceCode: settings.device_code_s, AccessToken: 600, ClientCredentials: 600 },
  features: {
    deviceFlow: { enabled: true },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo(_ctx, indicator) {
        if (!(indicator in settings.resources)) throw new errors.InvalidTarget();
        const alg = settings.resources[indicator];
        return { scope: 'use', audience: indicator, accessTokenFormat: 'jwt', jwt: { sign: { alg } } };
      },
    },
  },
});

// The package has no pace of its own. RFC 8628 sections 3.2 and 3.5: say one, and hold clients to it.
const polledAt = new Map();
provider.use(async (ctx, next) => {
  await next();
  if (ctx.oidc?.route === 'device_authorization' && ctx.status === 200) ctx.body.interval = settings.interval_s;
  if (ctx.oidc?.route === 'token' && ctx.body?.error === 'authorization_pending') {
    const code = ctx.oidc.params.device_code;
    const early = Date.now() - (polledAt.get(code) ?? 0) < settings.interval_s * 1000;
    polledAt.set(code, Date.now());
    if (early) ctx.body = { error: 'slow_down', error_description: 'polled too early' };
  }
});

server.on('request', provider.callback());
console.log(JSON.stringify({ issuer }));
