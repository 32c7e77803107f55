// Answers with a greeting. What stands outside the handler runs once, before the function is frozen.
export const handler = async (event) => {
  const name = event.name ?? "world";
  console.log(`greeting ${name}`);
  return { greeting: `Hello, ${name}!` };
};
